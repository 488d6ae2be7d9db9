"""Whether what was unlearned can be had back: probes, one file each, and what runs them."""
