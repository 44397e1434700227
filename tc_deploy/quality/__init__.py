"""How far pictures are from their reference: metrics, the classifier that judges them, one record of all figures."""
