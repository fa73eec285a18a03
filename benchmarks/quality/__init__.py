"""What does each method leave of a network, with and without repair?"""
