"""What trains, measures and draws: recipes, runs, the command line. It may import the core, never the reverse."""
