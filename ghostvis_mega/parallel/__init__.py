"""Who holds what: layout, process groups, image owners, the exchange of embeddings."""
