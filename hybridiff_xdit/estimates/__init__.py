"""What stands for the predictions that a step does not evaluate: tensors in, tensors out."""
