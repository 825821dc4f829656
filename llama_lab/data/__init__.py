"""From rows to tokens and labels."""
