"""One adapter file per provider. Third-party libraries are imported inside the functions, so that listing is cheap."""
