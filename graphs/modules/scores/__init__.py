"""The scores of edge selectors, one file each: ``selectors.registry.EDGE_SELECTORS`` names them."""
