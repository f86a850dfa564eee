"""Training, measuring and drawing: recipes, runs, the command line. It may import the core, never the reverse."""
