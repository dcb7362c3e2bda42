#!/bin/sh
# Makes coca-small: checks and chooses the data, then four trainings, one after the other. The model is in runs/small.
# What is done already is not done again.
#
#   scripts/train_small.sh SENTENCE_ENCODER.onnx TOKENIZER.json
#
# Expects in data/: flickr8k/ (images/, train.csv, val.csv, test_names.txt: the official test images' names), and with
# pictures and a captions.csv each, of which any may be left out of the recipes: coco/, photos/ (images/, train.csv),
# msrvtt/ (frames/, captions.csv), food/, web/. The model card says what the shipped weights had.
# data/flickr8k/images may hold the test images, too: all others are compared with what lies there.
# SENTENCE_ENCODER.onnx and TOKENIZER.json: see scripts/embed_sentences.py.
set -eu

python scripts/find_near_duplicates.py data/coco data/photos data/msrvtt data/food data/web \
    --names data/flickr8k/test_names.txt --against data/flickr8k/images
opencoca train recipes/flickr8k.yaml --output runs/flickr8k \
    --data.train_images data/flickr8k/images --data.train_captions data/flickr8k/train.csv \
    --data.val_images data/flickr8k/images --data.val_captions data/flickr8k/val.csv
if [ ! -f data/msrvtt/better.csv ]; then
    python scripts/filter_captions.py data/msrvtt/captions.csv data/msrvtt/better.csv --images data/msrvtt/frames \
        --model runs/flickr8k --keep 0.667
fi
if [ ! -f runs/sentences.safetensors ]; then
    python scripts/embed_sentences.py runs/sentences.safetensors data/flickr8k/train.csv data/*/captions.csv \
        data/photos/train.csv --onnx "$1" --tokenizer "$2"
fi
opencoca train recipes/small_captions.yaml
opencoca train recipes/small_rewarded.yaml
opencoca train recipes/small_linear.yaml
