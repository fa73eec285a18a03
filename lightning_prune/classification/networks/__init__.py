"""Classification networks, implemented from their publications."""
