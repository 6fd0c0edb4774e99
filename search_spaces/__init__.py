"""Search spaces that come with evosearch, one module per kind of genome, and recipes.

They register as entry points like anybody's; see `evosearch.space` for what a space must do.
"""
