"""A denoiser cut into stages: its units, where they are cut, and who runs which part of a step."""
