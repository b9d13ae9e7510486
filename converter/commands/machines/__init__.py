"""Commands of a job that many machines do."""
