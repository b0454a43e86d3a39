"""Objective, LoRA, optimizer, schedule and the run folder."""
