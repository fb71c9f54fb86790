"""Next-item models. Every file imports only its siblings, so that saved models can bring their code along."""
