"""IIT: interleaved conversations of text and images from benchmarks (Wings, section 4.2).

pool          single-choice questions of benchmarks, normalized
embedding     vectors of questions: wordllama's, or TF-IDF
selection     anchors, and the text questions that come before each
manifest      what was chosen, as identifiers and hashes; no text of a data set
conversation  the turns that a model is asked
report        accuracy of each setting, and paired differences between settings
command       `evaluate iit build` and `evaluate iit --manifest`
"""
