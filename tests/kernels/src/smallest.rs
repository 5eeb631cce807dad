//! A kernel that runs.

use crate::{Part, elf_at, load, note, notes, number};

/// The notes that a kernel of a few bytes has beside the two that it must have.
#[derive(Clone, Copy, Debug)]
pub struct Notes {
    /// ENTRY.
    pub entry: bool,
    /// `VIRT_BASE`.
    pub virt_base: bool,
    /// `HYPERCALL_PAGE`.
    pub hypercall_page: bool,
}

/// Where it is loaded: one page of code, and one that may be the hypercall page.
const START: u64 = 0x10_0000;
const PAGE: u16 = 0x1000;

/// A kernel that writes `word` to the hypervisor's log and powers off, if it is entered where its notes say, at the
/// address it was made for. It calls by the hypercall page if it asks for one. Otherwise it crashes.
#[must_use]
pub fn smallest(word: &str, has: Notes) -> Vec<u8> {
    let base = if has.virt_base { crate::BASE } else { 0 };
    // A wrong place to start, which is `ud2`, and then the right one.
    let (right, wrong) = (base + START + 2, base + START);
    let mut all = vec![note(5, b"xen-3.0\0"), note(8, b"generic\0")];
    all.extend(has.entry.then(|| number(1, right)));
    all.extend(has.hypercall_page.then(|| number(2, base + START + u64::from(PAGE))));
    all.extend(has.virt_base.then(|| number(3, base)));
    let code = code(word, right, has.hypercall_page);
    let text = Part { vaddr: base + START, ..load(START, &code, code.len() as u64) };
    elf_at(if has.entry { wrong } else { right }, &[text, notes(&all)])
}

/// Its two pages; `right` is the address of their third byte.
fn code(word: &str, right: u64, by_page: bool) -> Vec<u8> {
    let mut code = vec![0x0f, 0x0b];
    // lea rax, [rip - 7]; mov rdx, right; cmp rax, rdx; je behind the `ud2`.
    code.extend([0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0x48, 0xba]);
    code.extend(right.to_le_bytes());
    code.extend([0x48, 0x39, 0xd0, 0x74, 0x02, 0x0f, 0x0b]);
    // xor edi, edi; mov esi, length; lea rdx, [rip + text]: console_io's write.
    let text = format!("{word}\n");
    code.extend([0x31, 0xff, 0xbe]);
    code.extend(u32::try_from(text.len()).unwrap().to_le_bytes());
    code.extend([0x48, 0x8d, 0x15]);
    let to_text = code.len();
    code.extend([0; 4]);
    call(&mut code, 18, by_page);
    // mov edi, 2; lea rsi, [rip + reason]: sched_op's shutdown, whose reason is 0.
    code.extend([0xbf, 2, 0, 0, 0, 0x48, 0x8d, 0x35]);
    let to_reason = code.len();
    code.extend([0; 4]);
    call(&mut code, 29, by_page);
    code.extend([0x0f, 0x0b]);
    for (at, bytes) in [(to_text, text.as_bytes()), (to_reason, &[0; 4][..])] {
        let distance = u32::try_from(code.len() - at - 4).unwrap();
        code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        code.extend(bytes);
    }
    assert!(code.len() <= PAGE.into(), "the code runs into the hypercall page");
    code.resize(2 * usize::from(PAGE), 0xcc);
    code
}

/// A hypercall, from the hypercall page or by an instruction of its own.
fn call(code: &mut Vec<u8>, number: u8, by_page: bool) {
    if by_page {
        // call page + 32 * number
        let from = i32::try_from(code.len()).unwrap() + 5;
        code.push(0xe8);
        code.extend((i32::from(PAGE) + 32 * i32::from(number) - from).to_le_bytes());
    } else {
        // mov eax, number; syscall
        code.push(0xb8);
        code.extend(u32::from(number).to_le_bytes());
        code.extend([0x0f, 0x05]);
    }
}
