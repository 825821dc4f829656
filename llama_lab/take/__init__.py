"""What is done with a trained adapter: answers, measurements, merges, other formats, the hub, the run again."""
