"""What people launch: data, options, comparison, report, the pipeline of two stages."""
