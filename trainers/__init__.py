"""Trainers that nnU-Net finds through ``nnUNet_extTrainer``; ``nnUNetv2_vf env`` prints the line that sets it.

    vf_pretrain_trainer   VFPretrainTrainer: Volume Fusion pretraining. Its ``train_step`` runs at every training step.
    vf_finetune_trainer   VFFinetuneTrainer: nnU-Net's training and its ``train_step``, from pretrained weights or not

May import: all wings. Nothing imports a trainer.
"""
