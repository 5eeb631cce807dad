//! The calls a guest makes about itself, one file per family. `dispatch` decodes and lists them.

pub mod cpu;
pub mod descriptors;
pub mod info;
pub mod mmu;
pub mod vcpu;
