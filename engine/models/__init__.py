"""Native model definitions: config, registry, layers, decoder, weights."""
