"""A Flower project that trains with Equipoise's federated methods."""
