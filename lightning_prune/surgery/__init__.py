"""Remove units from a network physically, and prove the cut or roll it back."""
