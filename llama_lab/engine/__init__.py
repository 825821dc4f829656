"""The fast way to compute what PEFT and transformers compute, with fewer and larger operations."""
