"""The engine: graphs and their transforms. It knows nothing of models, data, files or terminals."""
