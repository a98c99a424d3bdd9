"""Training, evaluation and reports for MAGNeto: what stays at home when a model travels to the Hub."""
