"""Detections on a user's own pictures: `megdet predict`, and `megdet_hpc.load` in Python (docs/predict.md)."""
