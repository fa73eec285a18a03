"""What does a repair keep of a network right after one cut, without training?"""
