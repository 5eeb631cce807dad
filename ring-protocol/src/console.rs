//! The console page of a domain (ABI io 2.1): 1024 bytes towards the guest, 2048 bytes from it.

use crate::bytes::{BadIndices, ByteRing, Reader, Writer};
use crate::page::SharedPage;

/// Keystrokes: written by the back end, read by the guest.
pub const INPUT: ByteRing = ByteRing::new(0, 1024, 3072, 3076);
/// Text: written by the guest, read by the back end.
pub const OUTPUT: ByteRing = ByteRing::new(1024, 2048, 3080, 3084);
/// Offset of the byte that is 1 while no back end is connected. Written by the back end.
pub const CONNECTION: usize = 3088;

/// Marks the page as served (`true`) or waiting for a back end (`false`). Stock Linux ignores it.
pub fn set_connected<P: SharedPage>(page: &P, connected: bool) {
    page.write(CONNECTION, &[u8::from(!connected)]);
}

/// Reads the mark of [`set_connected`].
pub fn is_connected<P: SharedPage>(page: &P) -> bool {
    let mut byte = [0];
    page.read(CONNECTION, &mut byte);
    byte == [0]
}

/// The back end's view: takes output, gives input.
#[derive(Clone, Debug)]
pub struct BackEnd {
    /// What the guest prints.
    pub output: Reader,
    /// What is typed for the guest.
    pub input: Writer,
}

impl BackEnd {
    /// Connects where the last back end stopped; the page itself holds all the state there is.
    ///
    /// # Errors
    /// The indices of one direction contradict each other.
    pub fn attach<P: SharedPage>(page: &P) -> Result<Self, BadIndices> {
        let output = Reader::attach(OUTPUT, page)?;
        let input = Writer::attach(INPUT, page)?;
        set_connected(page, true);
        Ok(Self { output, input })
    }
}

/// The guest's view: gives output, takes input.
#[derive(Clone, Debug)]
pub struct FrontEnd {
    /// What we print.
    pub output: Writer,
    /// What is typed for us.
    pub input: Reader,
}

impl FrontEnd {
    /// Connects where the last front end stopped.
    ///
    /// # Errors
    /// The indices of one direction contradict each other.
    pub fn attach<P: SharedPage>(page: &P) -> Result<Self, BadIndices> {
        Ok(Self { output: Writer::attach(OUTPUT, page)?, input: Reader::attach(INPUT, page)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::WordPage;

    #[test]
    fn the_layout_is_the_abi_s() {
        let page: WordPage = WordPage::new();
        set_connected(&page, false);
        let mut guest = FrontEnd::attach(&page).unwrap();
        assert!(!is_connected(&page));
        let mut back = BackEnd::attach(&page).unwrap();
        assert!(is_connected(&page));
        guest.output.write(&page, b"ab").unwrap();
        back.input.write(&page, b"xyz").unwrap();
        let mut bytes = [0; 3];
        page.read(0, &mut bytes);
        assert_eq!(&bytes, b"xyz");
        page.read(1024, &mut bytes);
        assert_eq!(&bytes, b"ab\0");
        let indices = [3072, 3076, 3080, 3084].map(|offset| page.load_u32(offset));
        assert_eq!(indices, [0, 3, 0, 2]);
        assert_eq!(back.output.read(&page, &mut bytes), Ok(2));
        assert_eq!(page.load_u32(3080), 2);
        assert_eq!(guest.input.available(&page), Ok(3));
    }

    #[test]
    fn a_new_back_end_continues_where_the_last_one_stopped() {
        let page: WordPage = WordPage::new();
        let mut guest = FrontEnd::attach(&page).unwrap();
        guest.output.write(&page, b"hello").unwrap();
        let mut bytes = [0; 2];
        BackEnd::attach(&page).unwrap().output.read(&page, &mut bytes).unwrap();
        let mut rest = [0; 8];
        let mut second = BackEnd::attach(&page).unwrap();
        assert_eq!(second.output.read(&page, &mut rest), Ok(3));
        assert_eq!(&rest[..3], b"llo");
    }
}
