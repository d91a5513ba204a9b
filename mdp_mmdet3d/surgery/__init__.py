"""Cut a plan out of a dense model, and prove that the slim model equals the masked dense one."""
