"""LeRobotDatasets on disk: read, write, windows, statistics, batches."""
