//! Kernels like Linux, a domain in a vector, and a page-table walk of its own.

use guest_image::{Builder, MachineFrame, Pfn};
pub(crate) use test_kernels::{BASE, elf, load, note, notes, number};

/// What Linux has, but for INIT_P2M and MOD_START_PFN.
pub(crate) fn linux_notes(entry: u64) -> Vec<Vec<u8>> {
    vec![
        note(6, b"linux\0"),
        note(5, b"xen-3.0\0"),
        number(3, BASE),
        number(1, entry),
        note(10, b"!writable_page_tables|pae_pgdir_above_4gb"),
        note(8, b"generic\0"),
        note(17, &0x8801u32.to_le_bytes()),
    ]
}

/// A kernel like Linux: text at 16 MiB, a per-CPU segment with virtual address 0, 3 MiB of bss.
pub(crate) fn linux(extra: &[Vec<u8>]) -> Vec<u8> {
    let mut all = linux_notes(BASE + 0x100_0010);
    all.extend_from_slice(extra);
    elf(&[
        load(0x100_0000, &[0xaa; 0x2345], 0x2345),
        load(0x100_3000, b"per-cpu", 0x1000),
        load(0x100_4010, &[0xbb; 0x1800], 0x30_0000),
        notes(&all),
    ])
}

/// A domain whose machine frames are scattered, filled with rubbish at first.
pub(crate) struct Domain {
    pub(crate) pages: Vec<[u8; 4096]>,
    /// Refuse writes to this page.
    pub(crate) broken: Option<u64>,
    /// Bytes written.
    pub(crate) written: u64,
}

impl Domain {
    pub(crate) fn new(pages: u64) -> Self {
        Self { pages: vec![[0x5a; 4096]; usize::try_from(pages).unwrap()], broken: None, written: 0 }
    }

    /// Frames come out of order, as in a machine that has run for a while.
    pub(crate) fn frame(pfn: u64) -> u64 {
        0x1_0000 + (pfn ^ 0x155)
    }

    pub(crate) fn pfn_of(mfn: u64) -> u64 {
        (mfn - 0x1_0000) ^ 0x155
    }

    pub(crate) fn word(&self, pfn: u64, offset: usize) -> u64 {
        u64::from_le_bytes(self.pages[usize::try_from(pfn).unwrap()][offset..offset + 8].try_into().unwrap())
    }

    /// Walks the tables: the leaf entry and the three table pages passed, or `None` where nothing is mapped.
    pub(crate) fn walk(&self, root: MachineFrame, va: u64) -> Option<(u64, [u64; 4])> {
        let mut table = Self::pfn_of(root.0);
        let mut passed = [0; 4];
        for level in (0..4u32).rev() {
            passed[level as usize] = table;
            let entry = self.word(table, usize::try_from((va >> (12 + 9 * level)) & 511).unwrap() * 8);
            if entry & 1 == 0 {
                return None;
            }
            if level == 0 {
                return Some((entry, passed));
            }
            assert_eq!(entry & 0xfff, 0x67, "flags of a level {} entry", level + 1);
            table = Self::pfn_of(entry >> 12);
        }
        unreachable!()
    }
}

impl Builder for Domain {
    type Error = String;

    fn frame_of(&mut self, pfn: Pfn) -> Result<MachineFrame, String> {
        match usize::try_from(pfn.0) {
            Ok(page) if page < self.pages.len() => Ok(MachineFrame(Self::frame(pfn.0))),
            _ => Err(format!("no page {:#x}", pfn.0)),
        }
    }

    fn write(&mut self, pfn: Pfn, offset: usize, bytes: &[u8]) -> Result<(), String> {
        assert!(offset + bytes.len() <= 4096, "a write beyond its page");
        self.frame_of(pfn)?;
        self.written += bytes.len() as u64;
        if self.broken == Some(pfn.0) {
            return Err(format!("page {:#x} is broken", pfn.0));
        }
        self.pages[usize::try_from(pfn.0).unwrap()][offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}
