"""Glue to the libraries people train with. Each module needs its library; nothing here is imported by the package.

- `bonus_ops.integrations.transformers`: a Trainer's loss that feeds an `ExampleTracker`, and the callback with it.
- `bonus_ops.integrations.lightning`: a Callback that tracks, saves and restores.
- `bonus_ops.integrations.timm`: timm's BinaryCrossEntropy with a bonus.

**timm, with mixup.** Its targets are probabilities, which every loss here takes, so there is nothing to adapt::

    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    criterion = BonusCrossEntropyLoss(bonus=LogBonus(0.5))         # in the place of SoftTargetCrossEntropy
    input, target = mixup(input, target)
    loss = criterion(model(input), target)

**accelerate.** Losses need nothing. A tracker is saved with the rest, a sampler beside it::

    sampler = DifficultySampler(lambda: tracker.difficulty("mean_loss"), policy)      # rank and world_size left alone
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, sampler=sampler, ...))
    accelerator.register_for_checkpointing(tracker)                                  # after tracker.merge()
    for epoch in range(epochs):
        loader.set_epoch(epoch)                                                      # reaches the sampler
        for step, (index, input, target) in enumerate(loader, 1):
            loss, scores = bonus_cross_entropy_with_scores(model(input), target)
            accelerator.backward(loss)
            ...
            tracker.update(scores, index, target)
            if step == save_at:                                                      # in the middle of an epoch
                tracker.merge()
                accelerator.save_state(folder)
                trained = step * batch_size * accelerator.num_processes              # of this epoch
                torch.save(sampler.state_dict(position=trained), folder / "sampler.pt")
        tracker.merge()
        tracker.end_epoch()

accelerate shards the batches of the sampler over the processes and repeats a few examples to even them out
(``even_batches``); those are observed twice in that epoch. It looks one batch ahead, so that a sampler which it saves
itself (``register_for_checkpointing(sampler)``) has gone further than the training.
"""
