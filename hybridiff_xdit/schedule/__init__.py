"""Which kind is a step? The plan, the weights of the sampler, what is measured, and the policies."""
