"""Check a model server over HTTP: does it compute what an adapter file says?"""
