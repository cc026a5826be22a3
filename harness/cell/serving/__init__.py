"""Serve a trained LoRA adapter: start a model server, judge its answers, and time those that are right."""
