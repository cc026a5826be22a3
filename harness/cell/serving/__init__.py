"""Serve a trained LoRA adapter: start a model server, judge its answers, and time it under several loads.

A load is a mix of models that requests go to. It is timed only if its answers are right.
"""
