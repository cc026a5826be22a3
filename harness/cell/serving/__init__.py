"""Serve a trained LoRA adapter: start a model server, judge its answers, and time each load that has right answers."""
