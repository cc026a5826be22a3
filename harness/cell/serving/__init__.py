"""Serve a trained LoRA adapter: start a model server, judge its answers, and time the loads answered right."""
