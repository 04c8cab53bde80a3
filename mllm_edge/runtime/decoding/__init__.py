"""From logits to text: the loop, the choice of tokens, what may be shown."""
