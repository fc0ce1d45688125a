"""Raw sound: waveforms to tokens, data sets, training, prompted generation and evaluation."""
