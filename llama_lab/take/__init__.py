"""What is done with a trained adapter: answers, measurements, merged weights, other formats, the hub, and the run again."""
