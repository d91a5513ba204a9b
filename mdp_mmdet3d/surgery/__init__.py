"""Cut a plan out of a dense model, and prove that the pruned model equals the masked dense one."""
