"""Pictures in, numbers out: picture sets, features, distances and scores by name."""
