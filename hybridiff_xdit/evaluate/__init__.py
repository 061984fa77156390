"""Evaluates a branch: by CUDA graphs, its tokens split over ranks, or its layers (`stages`)."""
