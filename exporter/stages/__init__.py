"""One module per stage, each with ``run(context)``: a function of its inputs on disk."""
