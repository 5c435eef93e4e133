"""Files made to do harm, and every place that reads files from outside."""
