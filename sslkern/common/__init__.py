"""What every level uses and none owns: checks of arguments, torch functions that keep their type and their bits, rows
of features, and the node of autograd. Imports nothing else of sslkern."""
