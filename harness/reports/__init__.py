"""What reports of trained networks say: scores by class, confusions, mistakes, charts."""
