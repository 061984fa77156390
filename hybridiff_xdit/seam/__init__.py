"""The folder that knows diffusers' pipelines: what they call, and what they are loaded from."""
