"""How the retrieval model that ships in ``assets/`` was trained. Nothing of the engine depends on this."""
