"""DNA: FASTA to tokens, data sets, training, classification and evaluation."""
